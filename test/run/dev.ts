/**
 * `npm run dev`: the server and a stand-in tenant with its sign-in page, until Ctrl-C. For trying any MCP
 * client on this machine; needs no Auth0 account. Tasks are kept in memory.
 *
 * PORT (3000) is the server's port, TENANT_PORT (4000) the tenant's.
 */
import { startServer } from "../support/server.ts";
import { configuredTenant, startTenant } from "../support/tenant.ts";

const { PORT = "3000", TENANT_PORT = "4000" } = process.env;
const mcpServerUrl = `http://localhost:${PORT}/mcp`;
const tenant = await startTenant(
  // A free tenant's limit would end an afternoon of trying clients.
  { ...configuredTenant("permissive", mcpServerUrl), applicationLimit: Infinity },
  Number(TENANT_PORT),
);
const server = await startServer({
  AUTH0_DOMAIN: tenant.origin,
  MCP_SERVER_URL: mcpServerUrl,
  LOG_LEVEL: "debug",
});
const users = tenant.settings.users.map(({ email }) => email).join(" or ");
console.log(`Give your MCP client the URL ${mcpServerUrl} and sign in as ${users}. Ctrl-C ends both.`);

process.once("SIGINT", async () => {
  await server.close();
  await tenant.close();
});
