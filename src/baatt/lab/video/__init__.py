"""Video generation by a small model of Wan's architecture: how far sparse attention moves a sample."""
