"""NAVSIM's PDM score: simulator, scorers v1.1 and v2.2, the PDM-Closed reference, compiled and exact."""
