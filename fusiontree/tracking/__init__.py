"""Records of a run and their display: metrics, events, crash reports, console, trackers, plots, goodput."""
