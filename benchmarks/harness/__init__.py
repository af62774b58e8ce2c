"""What the measurements share: processes, memory, traces, the model of a network, and what is kept with a number."""
