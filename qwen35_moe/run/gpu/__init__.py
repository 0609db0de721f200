"""What only a GPU needs: grouped experts, graphs, reading ahead."""
