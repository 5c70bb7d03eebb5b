"""What a guest runs of ours: given to it at every start, so that no image depends on it."""
