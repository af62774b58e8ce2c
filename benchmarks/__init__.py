"""Data, runs and tables that show what the losses do."""
