"""What a recipe will cost before it runs: its calls are counted on the embedded miniature (counting), and priced on the meta device at their real size (pricing)."""
