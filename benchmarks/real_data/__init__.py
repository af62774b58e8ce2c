"""Image-caption pairs that people made, from npm and Debian packages. Run it to make a folder of them."""
