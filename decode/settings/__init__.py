"""The settings of a decode: grids and their controls, thresholds for wanted shares."""
