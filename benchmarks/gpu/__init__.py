"""The check of a GPU: its parts, each in a process of its own, their rows, and what changed since the last ones."""
