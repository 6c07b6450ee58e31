"""What the scorer must know of each scene, worked out once and stored. See README.md."""
