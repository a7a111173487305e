"""The questions: one file = one experiment with some knobs left open (BASE, OBJECTIVES, define(trial))."""
