"""Pages that people look at: of runs, and what they are made of."""
