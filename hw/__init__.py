"""Facts about and operations on hardware. Knows nothing of Kubernetes, of pods or of claims."""
