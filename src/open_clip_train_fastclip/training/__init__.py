"""Between a training loop and the loss: batches, saves, signals. Nothing here knows OpenCLIP."""
