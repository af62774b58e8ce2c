"""Small image-caption data made on the spot: Unicode characters in named colours. Run it to make a folder of them."""
