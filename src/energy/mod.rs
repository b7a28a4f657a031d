//! Device profiles, sensors, meters, carbon, baselines, the budget and the ledger.
