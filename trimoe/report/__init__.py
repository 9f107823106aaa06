"""What a finished folder has to show: one self-contained page, figures, and the way to the hub. Reads finished folders only."""
