"""What a run will take, before anything is spent: what is left to do, how much work it is, how long it takes on which machine."""
