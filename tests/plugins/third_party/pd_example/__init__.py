"""A transfer backend and a routing policy for pd. `pd_example.plugin` registers them."""
