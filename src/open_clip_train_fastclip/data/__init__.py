"""Which samples a run trains on, which is which, and where in the epoch it stands."""
