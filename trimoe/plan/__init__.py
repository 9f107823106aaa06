"""Before and after on paper: sizes, memory, disk, passes over the model, engines and warnings."""
