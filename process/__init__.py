"""What every process of ours has, server, engine and operator alike. Imports nothing else of ours."""
