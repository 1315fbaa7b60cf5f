"""What a run writes down and shows: records, crash reports, console, wandb, plots, goodput."""
