/**
 * `npm run dev`: the server and a stand-in tenant with its sign-in page, until Ctrl-C. For trying any MCP client on
 * this machine; needs no Auth0 account. Tasks are kept in memory.
 */
import { oneOf, type Print, readOptions, runCommand } from "./command.ts";
import { startServer } from "../support/server.ts";
import { configuredTenant, startTenant, TENANT_KINDS } from "../support/tenant.ts";

const HELP = `npm run dev
  Keeps the server and a stand-in for an Auth0 tenant running, for an MCP client on this machine. Ctrl-C ends both.

npm run dev -- OPTIONS
  --tenant KIND    permissive (the default) or strict: README, "Which way is yours"
  --help           this text

Environment
  PORT             the server's port, 3000
  TENANT_PORT      the tenant's port, 4000
  LOG_LEVEL        what the server's log holds: silent, info, or debug (the default here)`;

/**
 * Starts both.
 *
 * @param args The options after `npm run dev --`.
 * @returns Stops both.
 * @throws {Error} With a line for the user, where they cannot be started.
 */
export async function dev(
  args: string[],
  { PORT = "3000", TENANT_PORT = "4000", LOG_LEVEL = "debug" }: Record<string, string | undefined>,
  print: Print,
): Promise<() => Promise<void>> {
  const options = readOptions(args, { tenant: { type: "string", default: "permissive" } }, HELP, print);
  if (!options) return () => Promise.resolve();
  const kind = oneOf("--tenant", options.tenant, TENANT_KINDS);

  const mcpServerUrl = `http://localhost:${PORT}/mcp`;
  const settings = {
    ...configuredTenant(kind, mcpServerUrl),
    includeIssuerInAuthorizationResponses: true, // Gemini CLI signs in nowhere without it
    applicationLimit: Infinity, // a free tenant's is soon reached when many clients are tried
  };
  const tenant = await startTenant(settings, Number(TENANT_PORT)).catch(explainPort);
  const server = await startServer({
    AUTH0_DOMAIN: tenant.origin,
    MCP_SERVER_URL: mcpServerUrl,
    LOG_LEVEL,
  }).catch(async (error: unknown) => {
    await tenant.close();
    return explainPort(error);
  });
  const machine = settings.applications.find(({ grantTypes }) => grantTypes.includes("client_credentials"));
  print(`The server is ${server.url}: give this URL to your MCP client.
The tenant is ${tenant.issuer} (stand-in, ${kind}). It asks for no password: sign in as
${settings.users.map(({ email }) => `  ${email}`).join("\n")}

Next, in another terminal, an MCP client for your browser. Choose Streamable HTTP there, and paste the server's URL:
  npx @modelcontextprotocol/inspector

For the README's Step 6, and in .env for npm run doctor:
  AUTH0_DOMAIN=${tenant.origin}
  MCP_SERVER_URL=${server.url}
  AUTH0_CLIENT_ID=${machine?.clientId}
  AUTH0_CLIENT_SECRET=${machine?.clientSecret}

Ctrl-C ends both. The server's log:`);
  return async () => {
    await server.close();
    await tenant.close();
  };
}

function explainPort(error: unknown): never {
  if (!(error instanceof Error && "code" in error && error.code === "EADDRINUSE" && "port" in error)) throw error;
  throw new Error(`Port ${error.port} is in use: set PORT (the server's) or TENANT_PORT (the tenant's) to another`);
}

await runCommand(import.meta.url, async (args, print) => {
  const running = dev(args, process.env, print);
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, async () => (await running)());
  await running;
  return 0;
});
