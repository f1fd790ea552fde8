"""The parity gate: the user's own run, split over both sites, held against the same model in one process.

configs      the two runs: the user's config without what is random, and the same in one process
recorder     in each process: trains, and after each step writes what it holds
records      the files that it writes: slices, losses, norms, fingerprints
joining      slices of tensor-parallel processes <-> whole tensors
comparison   step by step, one parameter at a time: errors, and which are above the tolerances
tolerances   how far two correct runs may be apart, and why
diagnosis    what kind of error it is: a factor, shards in another order, a weight that stood still
planted      errors made on purpose, to see that the gate catches and names them
gate         starts the runs, in the order in which they are needed
report       what came of it; screens shows it
"""
