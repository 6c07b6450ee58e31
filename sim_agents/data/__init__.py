"""What a traffic model sees of a scene, and batches of it from a store."""
