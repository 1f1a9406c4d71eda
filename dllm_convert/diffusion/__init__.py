"""The mathematics of masked diffusion: noise schedules, corruption, objectives, likelihoods."""
