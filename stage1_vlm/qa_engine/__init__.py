"""Driving questions and answers from scenes, by a vision-language server: four phases of thought, then a judge."""
