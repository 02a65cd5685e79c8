"""The ground floor: what every room shares."""
