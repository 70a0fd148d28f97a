"""Before anything is held: checks of the environment and the plan of a run."""
