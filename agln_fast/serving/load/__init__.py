"""Load on a server of the Open Inference Protocol, in the scenarios of MLPerf Inference, and what came of it."""
