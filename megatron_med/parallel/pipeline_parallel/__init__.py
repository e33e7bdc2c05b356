"""Pipeline schedules as plain data, their simulation, and the engine that runs them."""
