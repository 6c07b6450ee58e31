"""Maps of cities as plain arrays, and the route of a scene through them. See README.md."""
