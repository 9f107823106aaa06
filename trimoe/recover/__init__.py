"""Recovery training of finished folders."""
