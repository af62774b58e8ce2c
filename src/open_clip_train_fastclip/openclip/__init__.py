"""OpenCLIP 3.3: its training scripts with FastCLIP in them. The only package that imports OpenCLIP."""
