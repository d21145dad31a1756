"""Run folders -> pages, curves, model cards; neither torch nor numpy."""
