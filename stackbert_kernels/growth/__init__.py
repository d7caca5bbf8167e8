"""Depth growth: operators are maps (depth.py), one function applies any map to weights and moments (apply.py)."""
