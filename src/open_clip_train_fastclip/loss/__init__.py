"""The FastCLIP losses: for any training loop, with torch alone."""
