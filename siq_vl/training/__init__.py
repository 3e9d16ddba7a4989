"""The three training stages: their recipes, what each freezes, and the checkpoints they leave."""
