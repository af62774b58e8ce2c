"""Training runs of the tables: started, stored, scored, and shown as Markdown and plots."""
