"""Studies: many runs described by one file, trained side by side, and compared in one report."""
