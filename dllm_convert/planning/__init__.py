"""From a source and a recipe to a plan that says what a run will do, from headers alone."""
