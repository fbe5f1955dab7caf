"""Methods: (schedule, times, **options) -> Plan, one file a family."""
