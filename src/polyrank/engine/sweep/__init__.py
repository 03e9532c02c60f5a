"""Learning-rate sweeps: a grid of rates for each method, selected on validation, shown on test.

    spec      what may stand in the YAML file
    grid      rates anchor·10^{i/per_decade}
    resolve   methods, streams and settings looked up; the runs that a file asks for
    schedule  which run comes next, from what is recorded alone
    runner    the loop; once makes one run by the engine, facts reads its folder
    records   runs.jsonl
    select    best rates, and what the table says of them

Only `resolve` and `once` need torch.
"""
