"""What a person sees of a run: curves, trees, sheets, the dashboard."""
