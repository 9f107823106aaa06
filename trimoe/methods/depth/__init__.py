"""Layer Drop and Block Drop."""
