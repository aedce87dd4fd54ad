"""Federated rounds over Flower: `federation.engine=flower`, with the results of the in-process engine."""
