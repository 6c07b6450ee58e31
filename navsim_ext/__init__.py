"""The base that all three stages stand on: scenes, maps, caches, scoring, evaluation. It knows no stage."""
