"""`fastblt load`: puts load on a server with OpenAI's completions and measures what its clients would see.

`workload` says what is asked, `arrivals` when, `http` sends it and notes when bytes come, `run` does a run of these,
`stats` counts, `show` and `report` tell.
"""
