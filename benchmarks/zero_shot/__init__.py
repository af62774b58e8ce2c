"""Zero-shot evaluation of a checkpoint: the tasks of each suite, and the score in one of them."""
