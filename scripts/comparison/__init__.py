"""The parts of `compare.py`: tasks, candidates, runs, the grid, and the report of its results."""
