"""What runs cost to reach a loss, side by side: runs.py reads them, comparison.py compares, table.py and figure.py show it."""
