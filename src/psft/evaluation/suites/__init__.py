"""The suites that come with psft, one YAML file each; `psft.evaluation.benchmarks` says what their keys mean."""
